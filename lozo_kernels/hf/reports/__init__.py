"""What a run of ``finetune`` reports: summary, model card and plots."""
