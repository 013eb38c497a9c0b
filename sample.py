"""Sample images from a saved model: python sample.py --labels cat ship --cfg-scale 2."""

from vision_ar.sample_cli import main

if __name__ == "__main__":
    main()
