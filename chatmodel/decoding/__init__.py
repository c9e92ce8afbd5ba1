"""The one engine that decodes: behind chat, evaluation and the rollouts of reinforcement learning."""
