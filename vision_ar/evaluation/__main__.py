"""python -m vision_ar.evaluation: score samples and reconstructions by named protocols."""

from vision_ar.evaluation.commands import main

if __name__ == "__main__":
    main()
