"""The paper's study of one model, end to end: which commands it takes, their results in one document and one page.

On top of ablation and fine-tuning; every measurement is one of the commands'.
"""
