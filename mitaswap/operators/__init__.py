"""Building blocks that several mechanisms share, in plain PyTorch: pooling, exact top-k, merged
softmax branches.
"""
