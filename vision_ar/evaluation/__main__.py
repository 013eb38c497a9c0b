"""python -m vision_ar.evaluation: score samples and reconstructions by named protocols."""

import sys

if __name__ == "__main__":
    try:
        from vision_ar.evaluation.commands import main
    except KeyboardInterrupt:  # PyTorch takes seconds to import
        sys.exit(2)
    main()
