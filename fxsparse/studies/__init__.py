"""Many runs of `fxsparse.training` under one plan: comparisons of methods, searches for settings."""
