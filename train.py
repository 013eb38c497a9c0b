"""Train a tokenizer or a generator: python train.py fit --config configs/tokenizers/dar_digits.yaml."""

from vision_ar.training.cli import main

if __name__ == "__main__":
    main()
