"""Use frames as they are made: print how bright each chunk is, keep nothing."""

from hhattn.video.generate import Pipeline, Request

if __name__ == "__main__":
    request = Request("a pink kite looping over the ocean, still camera", seconds=3, steps=2, seed=4)
    for chunk in Pipeline().stream(request):
        spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in chunk.seconds.items())
        print(f"chunk {chunk.index}: {len(chunk.frames)} frames, mean {chunk.frames.float().mean():.0f}/255; {spent}")
