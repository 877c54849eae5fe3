"""Small models of protocols, and a checker that visits every state they can reach."""
