"""Text, metrics and the settings of a training run; the loop itself is transformers' Trainer."""
