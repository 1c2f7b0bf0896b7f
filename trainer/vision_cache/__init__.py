"""Features of images from the frozen vision tower, kept in files; below the wings `data` and `model`, which use it."""
