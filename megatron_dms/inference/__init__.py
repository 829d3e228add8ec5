"""A checkpoint is loaded and generates: exports, plain models, and the methods they are compared with."""
