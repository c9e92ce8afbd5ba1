"""How good is a model? Bits per byte, CORE, ChatCORE, taught skills and samples."""
