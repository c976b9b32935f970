// TMA: boxes of tensors copied into shared memory, swizzled, with zeros for what lies outside.
#include <algorithm>

#include "machine.h"

namespace simt {

// The rules of cuTensorMapEncodeTiled (CUDA driver API, "Tensor Map Object Managment"). That a dimension's stride be a multiple of
// the one before isn't demanded: the driver doesn't, and [B, S, H, D] taken as heads of tokens couldn't be.
bool encode_tiled(TensorMap &map, unsigned element_bytes, unsigned rank, const void *base, const uint64_t *sizes, const uint64_t *strides,
                  const uint32_t *box, unsigned swizzle) {
  if (rank < 1 || rank > 5 || !element_bytes || reinterpret_cast<uintptr_t>(base) % 16) return false;
  map = TensorMap{};
  map.base = base;
  map.swizzle = uint8_t(swizzle);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > uint64_t(1) << 32 || box[i] < 1 || box[i] > 256) return false;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= uint64_t(1) << 40)) return false;
    map.sizes[i] = sizes[i];
    map.strides[i] = i ? strides[i - 1] : element_bytes;
    map.box[i] = box[i];
  }
  const unsigned row = box[0] * element_bytes;
  if (row % 16 || (swizzle != 16 && row > swizzle)) return false;
  if (swizzle != 16 && swizzle != 32 && swizzle != 64 && swizzle != 128) return false;
  map.rank = uint8_t(rank);
  return true;
}

// One row of the box, 16 bytes at a time: `source` is its first byte, null where the row lies outside; bytes [low, high) are inside.
static void copy_row(uint32_t dst, unsigned bytes, const char *source, long low, long high, unsigned swizzle, MBarrier &m, Site site) {
  const unsigned chunks = swizzle / 16;
  for (unsigned at = 0; at < bytes; at += 16) {
    uint32_t a = dst + at;
    a ^= (a >> 7 & (chunks - 1)) << 4;
    // elements before the first one would have to be zeros ahead of the rest: only whole chunks may lie there
    const bool inside = source && long(at) >= low && long(at) < high;
    start_bulk({a, inside ? source + at : nullptr, 16, inside ? unsigned(std::min(high - long(at), 16l)) : 0}, m, site);
  }
}

void tensor_load(uint32_t dst, const TensorMap &map, const int *at, uint32_t bar, Site site) {
  MBarrier &m = find_mbarrier(bar, "cp.async.bulk.tensor", site);
  if (!map.rank) {
    report(site, "tensor-map", "cp.async.bulk.tensor with a tensor map that was not encoded");
    stop();
  }
  if (dst % 128) report(site, "misaligned", "cp.async.bulk.tensor: shared address %#x is no multiple of 128", dst);
  const long element = long(map.strides[0]), low = -at[0] * element, high = (long(map.sizes[0]) - at[0]) * element;
  if (low > 0 && low % 16) {
    report(site, "tensor-map", "cp.async.bulk.tensor: a box that begins %ld bytes before the tensor; the emulator needs a multiple of 16", low);
    stop();
  }
  unsigned rows = 1, row_bytes = map.box[0] * unsigned(element);
  for (unsigned i = 1; i < map.rank; i++) rows *= map.box[i];
  for (unsigned row = 0; row < rows; row++, dst += row_bytes) {
    const char *source = static_cast<const char *>(map.base) + at[0] * element;
    unsigned rest = row;
    for (unsigned i = 1; i < map.rank; i++) {
      const long where = at[i] + long(rest % map.box[i]);
      rest /= map.box[i];
      if (where < 0 || where >= long(map.sizes[i])) source = nullptr;
      if (source) source += where * long(map.strides[i]);
    }
    copy_row(dst, row_bytes, source, low, high, map.swizzle, m, site);
  }
}

}  // namespace simt
