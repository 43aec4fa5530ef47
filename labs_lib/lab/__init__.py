"""What a notebook touches first: setup(), check(), progress(), the plots. Sits on top of every other room."""
