"""The commands of ``lit-rlhf``, one module each; imported when called."""
