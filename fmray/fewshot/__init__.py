"""Few-shot method: episodes, centroid classifier, encoders, finetuning methods, evaluation."""
