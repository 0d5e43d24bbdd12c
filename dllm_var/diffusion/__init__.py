"""How a mask predictor is trained: the forward process, packing and the objective, as pure functions and small objects."""
