"""Few-shot jobs on Ray: embedding, selection, finetuning, evaluation, comparison."""
