"""`python -m dualform` and the script `dualform`: run the command line, or say what is missing for it."""

from __future__ import annotations

import sys

try:
    from dualform.cli import main
except ModuleNotFoundError as missing:
    if missing.name is None or missing.name.startswith("dualform"):
        raise
    _name = missing.name

    def main(arguments: list[str] | None = None) -> int:
        print(
            f"dualform: the command line needs the package {_name!r}; expected the extra 'models'. "
            'Run `pip install "dualform[models,viz]"`.',
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
