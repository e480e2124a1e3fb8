"""What every operator couples, by kind of operator. Importing this registers all rules."""

from secateur.structure.rules import (  # noqa: F401
    attention,
    contraction,
    convolution,
    elementwise,
    indexing,
    norms,
    recurrent,
    reduction,
    shape,
)
