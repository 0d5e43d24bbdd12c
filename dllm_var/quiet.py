"""Silence of torchao, which transformers imports whenever it is installed; imported first by the package.

On machines without a GPU torchao reports at every start that its GPU kernels do not load, and torch that torchao uses an
old call. Neither matters here, and both would stand before every answer of a program.
"""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
