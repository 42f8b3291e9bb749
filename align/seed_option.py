"""`--seed`: of the verbs that draw at random; within what every library takes, as the seed of a run is."""

from typing import Annotated

import typer

LARGEST = 2**32 - 1

Seed = Annotated[int, typer.Option(min=0, max=LARGEST, help="What is drawn at random depends on it.")]
