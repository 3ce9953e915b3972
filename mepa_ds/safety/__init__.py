"""What keeps files and names from strangers from doing more than they should. SECURITY.md says what is promised.

`text`: what is shown. `secrets`: what is never shown. `places`: directories and files that others may reach, too.
`reading`: JSON and NumPy archives of any size and shape.
"""
