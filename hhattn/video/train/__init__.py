"""From nothing to weights: ``python -m hhattn.video.train {data,codec,prior,reader,dit,export}``."""
