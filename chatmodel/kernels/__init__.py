"""How does training compute single operations faster than plain PyTorch? Each file holds one, or the ways to one."""
