"""Makes base models: fine-tuned real ones, and the two embedded ones."""
