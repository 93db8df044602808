"""Dense models to sparse ones: what the programs convert and finetune are made of."""
