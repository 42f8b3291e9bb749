"""tests.helpers.fsdp_cli with tests.helpers.dying_once_cli: `align` sharded on CPUs, one process of which dies once."""

import tests.helpers.fsdp_cli  # noqa: F401  (changes accelerate)
from tests.helpers.dying_once_cli import main

if __name__ == "__main__":
    main()
