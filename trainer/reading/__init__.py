"""What a model reads in images: questions, greedy answers, scores, and examples to look at."""
