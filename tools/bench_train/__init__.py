"""What masked training costs: training steps of fxsparse, dense PyTorch and other packages that rewire, in turns."""
