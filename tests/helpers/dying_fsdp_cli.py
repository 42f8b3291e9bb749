"""tests.helpers.fsdp_cli and tests.helpers.dying_once_cli in one: `align` sharded on CPUs; one process dies once."""

import tests.helpers.fsdp_cli  # noqa: F401  (changes accelerate)
from tests.helpers.dying_once_cli import main

if __name__ == "__main__":
    main()
