"""Dense models to sparse ones: what the programs convert, finetune and convert_demo are made of."""
