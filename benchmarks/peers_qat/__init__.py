"""Other tools' quantization-aware training, one file per tool; each imports its tool alone."""
