"""One file per paper: Config, objective, train. Papers never import papers."""
