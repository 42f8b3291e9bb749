"""tests.fsdp_cli and tests.dying_once_cli in one: `align` sharded on CPUs, of which a process dies once."""

import tests.fsdp_cli  # noqa: F401  (changes accelerate)
from tests.dying_once_cli import main

if __name__ == "__main__":
    main()
