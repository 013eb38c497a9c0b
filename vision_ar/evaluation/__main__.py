"""python -m vision_ar.evaluation: score samples and reconstructions by named protocols."""

import sys

if __name__ == "__main__":
    try:
        from vision_ar.evaluation.commands import main
    except KeyboardInterrupt:  # PyTorch takes seconds to import
        print("error: stopped; the same command goes on", file=sys.stderr)
        sys.exit(2)
    main()
