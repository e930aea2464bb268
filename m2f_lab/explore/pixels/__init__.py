"""PixelExplorer: where a pixel's score comes from."""
