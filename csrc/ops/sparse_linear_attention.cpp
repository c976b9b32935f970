// Schemas and bindings of sparse_linear_attention's linear branch; the other is block_sparse_attention.
#include "marginal_pairs.h"

namespace hhattn {
namespace {

Marginal arguments(const Tensor& q, const Tensor& k, const Tensor& v, const BlockMask& mask, int64_t phi, double eps) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, S, H, D]");
  check_sizes(k, {q.size(0), k.size(1), k.size(2), q.size(3)}, "k");
  check_sizes(v, {q.size(0), k.size(1), k.size(2), v.size(3)}, "v");
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "q must have a multiple of k's heads");
  STD_TORCH_CHECK(q.size(3) <= 256 && v.size(3) <= 256, "the head dim must be at most 256");
  STD_TORCH_CHECK(mask.nq == (q.size(1) + mask.bq - 1) / mask.bq, "the mask is for another number of queries");
  STD_TORCH_CHECK(phi >= 0 && phi <= 4 && phi != 1, "phi must be 0 (relu), 2 (elu1), 3 (relu2), 4 (softmax)");
  Marginal a;
  a.q = heads(q, "q");
  a.k = heads(k, "k");
  a.v = heads(v, "v");
  a.phi = static_cast<FeatureMap>(phi);
  a.q_len = q.size(1);
  a.k_len = k.size(1);
  a.heads = q.size(2);
  a.kv_heads = k.size(2);
  a.dim = q.size(3);
  a.v_dim = v.size(3);
  a.bq = mask.bq;
  a.bk = mask.bk;
  a.nq = mask.nq;
  a.nk = mask.nk;
  a.eps = static_cast<float>(eps);
  return a;
}

// The pairs of every entry of the mask, and what all heads need of them.
class AllPairs {
 public:
  AllPairs(const BlockMask& m, int64_t tiles, const Marginal& a, bool complement, bool backward)
      : m_(m), parts_(m, tiles, a.q_len, a.k_len, complement) {
    for (int64_t b = 0; b < m.batches; ++b) {
      for (int64_t h = 0; h < m.heads; ++h) lists_.emplace_back(m, b, h, complement, backward, parts_);
    }
    for (const PairLists& lists : lists_) has_parts_ |= lists.has_parts();
  }
  const uint8_t* bits() const { return parts_.bits(); }
  bool has_parts() const { return has_parts_; }
  const MarginalPairs* of(int64_t b, int64_t h) const { return &lists_[m_.row_index(b, h, 0) / m_.nq].view(); }

 private:
  const BlockMask& m_;
  Parts parts_;
  std::vector<PairLists> lists_;
  bool has_parts_ = false;
};

// Pairs of batch entry and key head that are worked on together: their rows as floats, which each slice of v's columns reads.
class Group {
 public:
  Group(const Marginal& a, const AllPairs& pairs, int64_t most, bool backward)
      : a_(a), pairs_(pairs), rep_(a.rep()), width_(padded(a.dim)), v_width_(padded(a.v_dim)) {
    const int64_t queries = rep_ * a.q_len, parts = pairs.has_parts();
    sizes_ = {a.k_len * width_, a.k_len * v_width_, queries * width_, backward ? 0 : parts * queries * v_width_};
    if (backward) {
      sizes_.insert(sizes_.end(), {queries * v_width_, queries, queries * width_, a.k_len * width_, parts * a.k_len * v_width_});
    }
    for (const int64_t size : sizes_) each_ += (size + 15) / 16 * 16;
    memory_ = make_scratch(most * each_);
    turns_.resize(most * (rep_ * a.nq + a.nk));
  }

  // Makes it that of `count` pairs from `first` on.
  void begin(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    of_heads_.clear();
    for (int64_t n = first * rep_; n < (first + count) * rep_; ++n) of_heads_.push_back(pairs_.of(n / a_.heads, n % a_.heads));
    std::fill(turns_.begin(), turns_.end(), 0);
    for (int64_t n = 0; n < count; ++n) pack(heads(n));
  }

  MarginalHeads heads(int64_t n) {
    return {(first_ + n) / a_.kv_heads, (first_ + n) % a_.kv_heads, part(n, 0), part(n, 1), part(n, 2), part(n, 3),
            of_heads_.data() + n * rep_};
  }
  MarginalGradients gradients(int64_t n) {
    int32_t* turns = turns_.data() + n * (rep_ * a_.nq + a_.nk);
    return {part(n, 4), part(n, 5), part(n, 6), part(n, 7), part(n, 8), turns, turns + rep_ * a_.nq};
  }
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  int64_t v_width() const { return v_width_; }

 private:
  float* part(int64_t n, size_t index) {
    float* at = memory_.get() + n * each_;
    for (size_t i = 0; i < index; ++i) at += (sizes_[i] + 15) / 16 * 16;
    return sizes_[index] > 0 ? at : nullptr;
  }
  void pack(const MarginalHeads& p) {
    const Kernels& use = kernels();
    parallel(0, a_.k_len, 1024, [&](int64_t begin, int64_t end) {
      use.map_rows(a_.k, a_.phi, p.b, p.kv_head, begin, end, a_.dim, p.keys + begin * width_);
      use.map_rows(a_.v, FeatureMap::identity, p.b, p.kv_head, begin, end, a_.v_dim, p.values + begin * v_width_);
    });
    for (int64_t r = 0; r < rep_; ++r) {
      parallel(0, a_.q_len, 1024, [&](int64_t begin, int64_t end) {
        use.map_rows(a_.q, a_.phi, p.b, p.kv_head * rep_ + r, begin, end, a_.dim, p.queries + (r * a_.q_len + begin) * width_);
      });
    }
  }

  const Marginal& a_;
  const AllPairs& pairs_;
  int64_t rep_, width_, v_width_, each_ = 0, first_ = 0, count_ = 0;
  std::vector<int64_t> sizes_;
  std::vector<const MarginalPairs*> of_heads_;
  std::vector<int32_t> turns_;
  Scratch memory_;
};

// f(group) for every group of pairs of batch entry and key head.
template <class F>
void each_group(const Marginal& a, const AllPairs& pairs, int64_t batch, bool backward, const F& f) {
  std::optional<Group> group;
  for_groups(batch * a.kv_heads, (a.v_dim + kSlice - 1) / kSlice, [&](int64_t first, int64_t count, int64_t most) {
    if (!group) group.emplace(a, pairs, most, backward);
    group->begin(first, count);
    f(*group);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_num_blocks,
                                   const Tensor& kv_indices, const Tensor& kv_tiles, const Tensor& full_kv_num_blocks,
                                   const Tensor& full_kv_indices, const Tensor& tiles, int64_t bk, bool complement, int64_t phi,
                                   double eps) {
  const BlockMask mask =
      block_mask({kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, k.size(1));
  Marginal a = arguments(q, k, v, mask, phi, eps);
  const AllPairs pairs(mask, tiles.size(0), a, complement, false);
  a.bits = pairs.bits();
  Tensor out = new_tensor(q, {q.size(0), a.q_len, a.heads, a.v_dim});
  Tensor den = new_tensor(q, {q.size(0), a.heads, a.q_len}, torch::headeronly::ScalarType::Float);
  a.out = output(out);
  a.den = static_cast<float*>(den.mutable_data_ptr());
  const Kernels& use = kernels();
  const int64_t rep = a.rep(), slices = (a.v_dim + kSlice - 1) / kSlice;
  each_group(a, pairs, q.size(0), false, [&](Group& group) {
    const int64_t parts = pairs.has_parts() ? group.count() * rep * a.nq : 0;
    for_each_item(parts, use.marginal_scratch(a, MarginalWork::parts), [&](int64_t item, float* scratch) {
      use.marginal_part_sums(a, group.heads(item / a.nq / rep), item / a.nq % rep, item % a.nq, scratch);
    });
    for_each_item(group.count() * rep, use.marginal_scratch(a, MarginalWork::weights), [&](int64_t item, float* scratch) {
      use.marginal_weights(a, group.heads(item / rep), item % rep, scratch);
    });
    for_each_item(group.count() * slices, use.marginal_scratch(a, MarginalWork::outputs), [&](int64_t item, float* scratch) {
      use.marginal_outputs(a, group.heads(item / slices), item % slices, scratch);
    });
  });
  return {out, den};
}

// Gradients for those of the features, in all of the group's heads.
void store_feature_gradients(const Marginal& a, Group& group, Tensor& dq, Tensor& dk) {
  const Kernels& use = kernels();
  const Out q_out = output(dq), k_out = output(dk);
  for (int64_t n = 0; n < group.count(); ++n) {
    const MarginalHeads p = group.heads(n);
    const MarginalGradients g = group.gradients(n);
    parallel(0, a.k_len, 1024, [&](int64_t begin, int64_t end) {
      use.map_rows_backward(a.k, a.phi, p.b, p.kv_head, begin, end, a.dim, g.dphi_k + begin * group.width(), k_out, a.k_len, a.kv_heads);
    });
    for (int64_t r = 0; r < a.rep(); ++r) {
      parallel(0, a.q_len, 1024, [&](int64_t begin, int64_t end) {
        use.map_rows_backward(a.q, a.phi, p.b, p.kv_head * a.rep() + r, begin, end, a.dim,
                              g.dphi_q + (r * a.q_len + begin) * group.width(), q_out, a.q_len, a.heads);
      });
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& den, const Tensor& kv_num_blocks,
                                            const Tensor& kv_indices, const Tensor& kv_tiles, const Tensor& full_kv_num_blocks,
                                            const Tensor& full_kv_indices, const Tensor& tiles, int64_t bk, bool complement,
                                            int64_t phi) {
  const BlockMask mask =
      block_mask({kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles}, bk, k.size(1));
  MarginalBackward g;
  Marginal& a = g.forward;
  a = arguments(q, k, v, mask, phi, 0);
  check_sizes(dout, {q.size(0), a.q_len, a.heads, a.v_dim}, "dout");
  check_sizes(out, {q.size(0), a.q_len, a.heads, a.v_dim}, "out");
  check_sizes(den, {q.size(0), a.heads, a.q_len}, "den");
  STD_TORCH_CHECK(out.is_contiguous() && den.is_contiguous(), "out and den must be contiguous");
  STD_TORCH_CHECK(den.scalar_type() == torch::headeronly::ScalarType::Float, "den must be float32");
  const AllPairs pairs(mask, tiles.size(0), a, complement, true);
  a.bits = pairs.bits();
  a.out = {const_cast<void*>(out.const_data_ptr()), dtype_of(out, "out")};
  a.den = const_cast<float*>(static_cast<const float*>(den.const_data_ptr()));
  g.dout = heads(dout, "dout");
  Tensor dq = empty(q), dk = empty(k), dv = empty(v);
  g.dv = output(dv);
  const Kernels& use = kernels();
  const int64_t rep = a.rep(), slices = (a.v_dim + kSlice - 1) / kSlice;
  each_group(a, pairs, q.size(0), true, [&](Group& group) {
    const int64_t count = group.count(), queries = pairs.has_parts() ? count * rep * a.nq : 0;
    for (int64_t n = 0; n < count * rep; ++n) {
      const MarginalHeads p = group.heads(n / rep);
      const MarginalGradients to = group.gradients(n / rep);
      parallel(0, a.q_len, 1024, [&](int64_t begin, int64_t end) {
        const int64_t at = n % rep * a.q_len + begin;
        use.marginal_upstream(g, p.b, p.kv_head * rep + n % rep, begin, end, to.u + at * group.v_width(), to.e + at);
      });
    }
    for_each_item(count, use.marginal_scratch(a, MarginalWork::weights), [&](int64_t n, float* scratch) {
      use.marginal_weights_backward(g, group.heads(n), group.gradients(n), scratch);
    });
    const int64_t small = use.marginal_scratch(a, MarginalWork::parts);
    for_each_item(queries, small, [&](int64_t item, float* scratch) {
      const int64_t n = item / a.nq / rep;
      use.marginal_part_queries(g, group.heads(n), group.gradients(n), item / a.nq % rep, item % a.nq, scratch);
    });
    for_each_item(queries ? count * a.nk : 0, small, [&](int64_t item, float* scratch) {
      use.marginal_part_keys(g, group.heads(item / a.nk), group.gradients(item / a.nk), item % a.nk, scratch);
    });
    for_each_item(count * slices, use.marginal_scratch(a, MarginalWork::gradients), [&](int64_t item, float* scratch) {
      use.marginal_gradients(g, group.heads(item / slices), group.gradients(item / slices), item % slices, scratch);
    });
    store_feature_gradients(a, group, dq, dk);
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace hhattn

STABLE_TORCH_LIBRARY_FRAGMENT(hhattn, m) {
  m.def(
      "sparse_linear_marginal(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, "
      "Tensor full_kv_num_blocks, Tensor full_kv_indices, Tensor tiles, int bk, bool complement, int phi, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "sparse_linear_marginal_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor den, "
      "Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, Tensor full_kv_num_blocks, Tensor full_kv_indices, "
      "Tensor tiles, int bk, bool complement, int phi) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hhattn, CPU, m) {
  m.impl("sparse_linear_marginal", TORCH_BOX(&hhattn::forward));
  m.impl("sparse_linear_marginal_backward", TORCH_BOX(&hhattn::backward));
}
