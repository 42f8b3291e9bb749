"""How far to believe the label, how far the margin: read off the user's own data before training.

    pairs + margins --> calibrate (slope b) --.
    frozen features --> proxy (linear policies) --> held-out labels --> choose (t, g) --> sentences, JSON, plot
                                  evidence (errors' sizes, flip rate) --'

Legend of the package: N pairs, D feature directions, S settings of a loss (trust, strength, prior), all at once.
"""
