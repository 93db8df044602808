"""Dense models to trees: what the programs convert, finetune and convert_demo are made of."""
