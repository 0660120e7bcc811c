"""``python -m specnorm_fx``, and the command ``specnorm-fx`` where it may lack what it needs."""

import sys


def main() -> int:
    """Run the command; without NumPy, which this library does without elsewhere, say so."""
    try:
        from specnorm_fx import cli
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        print("specnorm-fx: error: it needs NumPy: pip install 'specnorm-fx[onnx]'.", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
