"""Equilibrium Matching (arXiv 2510.02300): training and sampling in FP32, BF16 and FP16."""
