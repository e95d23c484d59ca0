"""Says how the built-in rows differ from the installed genai-prices. Exit 1 where a difference has no reason."""

import sys

from tools.catalogue.comparison import differences


def main() -> int:
    found = differences()
    unexplained = sum(difference.why is None for difference in found)
    summary = f"{len(found)} differences, {unexplained} of them without a reason"
    sys.stdout.write("\n".join([*map(str, found), summary, ""]))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
