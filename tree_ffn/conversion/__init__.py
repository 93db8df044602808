"""Dense layers into trees: where units stand, how decisions are fitted, and what is solved for again."""
