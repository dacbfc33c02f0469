"""Training runs of ours against plain PyTorch loops, step by step; see scripts/check_training.py."""
