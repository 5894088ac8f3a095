"""The AdaLLaVA training method: model, batches, evaluation."""
