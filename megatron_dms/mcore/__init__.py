"""The Megatron-Core plug-in: predictor, attention, layer specs, compression account."""
