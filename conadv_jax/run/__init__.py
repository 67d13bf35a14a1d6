"""What a run keeps and tells: work directory, metrics, evaluation, pictures."""
