"""How is a base model pretrained, and how does the run survive whatever happens to it?"""
