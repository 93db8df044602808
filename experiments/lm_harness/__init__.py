"""Questions: EleutherAI's harness, its task files, and our models that answer."""
