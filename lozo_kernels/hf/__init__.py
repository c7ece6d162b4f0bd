"""Fine-tuning Hugging Face models from the command line: tasks, data, the loop and its reports.

Only this package imports transformers, and only inside the functions that need it (the pretraining script apart).
"""
