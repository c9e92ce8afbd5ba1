"""Where does training text come from, and in which rows does the model see it?"""
